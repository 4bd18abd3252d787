"""From documents to batches, with numpy only.

    corpora      documents of a corpus, and their splits
    tokenizers   text to token ids and back; `tokenizer_files` for classification
    prepare      documents to a folder of token ids and a manifest (`gptlab prepare`)
    containers   one file of token ids; `foreign` for folders of other trainers
    shards       prepared text as two memory-mapped streams of token ids
    labeled      prepared documents with labels, for classification
    sampler      which window of a stream is sequence g of a run

Reading a prepared dataset:

    >>> dataset = Dataset("data/shakespeare-char")              # gptlab.data.shards
    >>> dataset.check(vocab_size=65)
    >>> windows = Windows(dataset.train, 64, "shuffled", 1337)  # gptlab.data.sampler
    >>> windows.batch(first=0, count=12).shape                  # 12 sequences: 64 inputs, and targets shifted by one
    (12, 65)

A training process imports neither a corpus nor a tokenizer's library. docs/formats.md describes the files.
"""
