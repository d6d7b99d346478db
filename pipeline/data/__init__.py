"""What happens to text, in order. Imports never run in a circle.

source                              the contract of a data source, by which all stages read text
locations, readers, columns         where text lies, and how files and hub datasets are read
stdlib, ciphers                     the embedded corpora
conversations                       messages
documents, tables                   the source of texts and conversations, in three splits
controls                            tokens of texts: what a text spells is no control token
rendering, turns                    chat templates, and where in what they write the assistant speaks
pieces                              documents tokenized; of two tokenizers also alignment, token_bytes
packing, prepared                   pieces into packed sequences, and these on disk
examples, records, demonstrations   what a task is made of; tasks is the source of queries with answers
prompts, filters, answers, pairs    what a teacher is asked, which answers stay, and the source of answers
calibration                         a little text for stages that change a finished model
shown                               sequences as a person reads them
loader, batch                       packed sequences into batches, the same for every topology
"""
