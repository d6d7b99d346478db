/* A disk that is full from some call on: preloaded into every process of a command (LD_PRELOAD), it writes down the calls
   that write to files under one folder, and makes those fail that tests/full_disk.py says, as a file system would.

   RETORT_TEST_DISK names a file that all processes share: a head, and what was called, a record each. Writing to a file
   through mmap is written down too, as "mmap", and never fails: a full disk answers that with SIGBUS. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define RECORDS 65536

/* As in tests/full_disk.py. */
struct head {
    int64_t calls;     /* so far */
    int64_t failed;    /* of them */
    int64_t all;       /* whether every call fails after the first that did */
    int64_t code;      /* with which errno */
    char pattern[496]; /* of the call that fails first, as fnmatch has it; empty: none does */
    char under[496];   /* the folder */
    char records[RECORDS][512];
};

static struct head *disk;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("RETORT_TEST_DISK");
    int handle = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (handle < 0)
        return;
    void *at = mmap(NULL, sizeof(struct head), PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
    close(handle);
    if (at != MAP_FAILED)
        disk = at;
}

/* 0, or the errno with which this call is to fail */
static int refused(const char *call, const char *path) {
    char record[512];
    size_t length = disk ? strlen(disk->under) : 0;
    if (!length || strncmp(path, disk->under, length) || (path[length] != '/' && path[length]))
        return 0;
    snprintf(record, sizeof record, "%s %.480s", call, path + length);
    int64_t number = __atomic_fetch_add(&disk->calls, 1, __ATOMIC_SEQ_CST);
    if (number < RECORDS)
        strcpy(disk->records[number], record);
    if (!strcmp(call, "mmap") || !disk->pattern[0])
        return 0;
    if (disk->failed ? !disk->all : fnmatch(disk->pattern, record, 0) != 0)
        return 0;
    __atomic_add_fetch(&disk->failed, 1, __ATOMIC_SEQ_CST);
    return (int)disk->code;
}

static void of_handle(int handle, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void of_name(int folder, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(path, PATH_MAX))
            path[0] = 0;
    } else
        of_handle(folder, path);
    size_t length = strlen(path);
    snprintf(path + length, PATH_MAX - length, "/%s", name);
}

static int refused_handle(const char *call, int handle) {
    char path[PATH_MAX];
    int kept = errno;
    if (!disk)
        return 0;
    of_handle(handle, path);
    errno = kept;
    return refused(call, path);
}

static int refused_name(const char *call, int folder, const char *name) {
    char path[PATH_MAX];
    int kept = errno;
    if (!disk || !name)
        return 0;
    of_name(folder, name, path);
    errno = kept;
    return refused(call, path);
}

/* A file that is there already needs no room for its name. */
static int refused_open(int folder, const char *name, int flags) {
    struct stat found;
    int kept = errno;
    int made = (flags & O_TMPFILE) == O_TMPFILE || ((flags & O_CREAT) && fstatat(folder, name, &found, 0));
    errno = kept;
    return made ? refused_name("open", folder, name) : 0;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(code) \
    do { \
        int refusal = (code); \
        if (refusal) { \
            errno = refusal; \
            return -1; \
        } \
    } while (0)
#define ON_HANDLE(kind, name, call, handle, parameters, arguments) \
    kind name parameters { \
        REAL(name); \
        FAIL(refused_handle(call, handle)); \
        return real arguments; \
    }
#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

ON_HANDLE(ssize_t, write, "write", fd, (int fd, const void *from, size_t size), (fd, from, size))
ON_HANDLE(ssize_t, writev, "write", fd, (int fd, const struct iovec *from, int count), (fd, from, count))
ON_HANDLE(ssize_t, pwrite, "write", fd, (int fd, const void *from, size_t size, off_t at), (fd, from, size, at))
ON_HANDLE(ssize_t, pwrite64, "write", fd, (int fd, const void *from, size_t size, off64_t at), (fd, from, size, at))
ON_HANDLE(ssize_t, pwritev, "write", fd, (int fd, const struct iovec *v, int count, off_t at), (fd, v, count, at))
ON_HANDLE(ssize_t, pwritev64, "write", fd, (int fd, const struct iovec *v, int count, off64_t at), (fd, v, count, at))
ON_HANDLE(ssize_t, sendfile, "write", fd, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
ON_HANDLE(ssize_t, sendfile64, "write", fd, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))
ON_HANDLE(ssize_t, copy_file_range, "write", fd,
          (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags), (from, at, fd, to, size, flags))
ON_HANDLE(int, ftruncate, "ftruncate", fd, (int fd, off_t size), (fd, size))
ON_HANDLE(int, ftruncate64, "ftruncate", fd, (int fd, off64_t size), (fd, size))
ON_HANDLE(int, fallocate, "fallocate", fd, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
ON_HANDLE(int, fallocate64, "fallocate", fd, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
ON_HANDLE(int, fsync, "fsync", fd, (int fd), (fd))
ON_HANDLE(int, fdatasync, "fsync", fd, (int fd), (fd))

int posix_fallocate(int fd, off_t at, off_t size) {
    REAL(posix_fallocate);
    int refusal = refused_handle("fallocate", fd); /* it returns the code */
    return refusal ? refusal : real(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size) {
    REAL(posix_fallocate64);
    int refusal = refused_handle("fallocate", fd);
    return refusal ? refusal : real(fd, at, size);
}

int open(const char *name, int flags, ...) {
    MODE REAL(open);
    FAIL(refused_open(AT_FDCWD, name, flags));
    return real(name, flags, mode);
}

int open64(const char *name, int flags, ...) {
    MODE REAL(open64);
    FAIL(refused_open(AT_FDCWD, name, flags));
    return real(name, flags, mode);
}

int openat(int folder, const char *name, int flags, ...) {
    MODE REAL(openat);
    FAIL(refused_open(folder, name, flags));
    return real(folder, name, flags, mode);
}

int openat64(int folder, const char *name, int flags, ...) {
    MODE REAL(openat64);
    FAIL(refused_open(folder, name, flags));
    return real(folder, name, flags, mode);
}

int creat(const char *name, mode_t mode) { return open(name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return open64(name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

FILE *fopen(const char *name, const char *mode) {
    REAL(fopen);
    int refusal = strpbrk(mode, "wa") ? refused_open(AT_FDCWD, name, O_CREAT) : 0;
    if (refusal) {
        errno = refusal;
        return NULL;
    }
    return real(name, mode);
}

FILE *fopen64(const char *name, const char *mode) {
    REAL(fopen64);
    int refusal = strpbrk(mode, "wa") ? refused_open(AT_FDCWD, name, O_CREAT) : 0;
    if (refusal) {
        errno = refusal;
        return NULL;
    }
    return real(name, mode);
}

/* What a FILE buffers goes past the functions above. */
size_t fwrite(const void *from, size_t size, size_t count, FILE *file) {
    REAL(fwrite);
    int refusal = refused_handle("write", fileno(file));
    if (refusal) {
        errno = refusal;
        return 0;
    }
    return real(from, size, count, file);
}

int mkdir(const char *name, mode_t mode) {
    REAL(mkdir);
    struct stat found;
    int kept = errno, there = !stat(name, &found);
    errno = kept;
    FAIL(there ? 0 : refused_name("mkdir", AT_FDCWD, name));
    return real(name, mode);
}

int mkdirat(int folder, const char *name, mode_t mode) {
    REAL(mkdirat);
    FAIL(refused_name("mkdir", folder, name));
    return real(folder, name, mode);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    FAIL(refused_name("rename", AT_FDCWD, to));
    return real(from, to);
}

int renameat(int one, const char *from, int other, const char *to) {
    REAL(renameat);
    FAIL(refused_name("rename", other, to));
    return real(one, from, other, to);
}

int renameat2(int one, const char *from, int other, const char *to, unsigned flags) {
    REAL(renameat2);
    FAIL(refused_name("rename", other, to));
    return real(one, from, other, to, flags);
}

int link(const char *from, const char *to) {
    REAL(link);
    FAIL(refused_name("link", AT_FDCWD, to));
    return real(from, to);
}

int linkat(int one, const char *from, int other, const char *to, int flags) {
    REAL(linkat);
    FAIL(refused_name("link", other, to));
    return real(one, from, other, to, flags);
}

int symlink(const char *from, const char *to) {
    REAL(symlink);
    FAIL(refused_name("link", AT_FDCWD, to));
    return real(from, to);
}

void *mmap(void *where, size_t size, int protection, int flags, int fd, off_t at) {
    REAL(mmap);
    if (disk && fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED))
        refused_handle("mmap", fd);
    return real(where, size, protection, flags, fd, at);
}

void *mmap64(void *where, size_t size, int protection, int flags, int fd, off64_t at) {
    REAL(mmap64);
    if (disk && fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED))
        refused_handle("mmap", fd);
    return real(where, size, protection, flags, fd, at);
}
