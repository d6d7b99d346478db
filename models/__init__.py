"""Whatever touches a tensor."""

import logging

# Before any of them is imported: they tell of kernels for other devices, and of parameters on meta.
for _chatter in ("torchao", "torch.utils._pytree", "accelerate.big_modeling"):
    logging.getLogger(_chatter).setLevel(logging.ERROR)
