"""Text data: from documents to batches of token ids, with numpy only.

    corpora      documents, each in the training or the validation split
    tokenizers   text to token ids and back
    prepare      documents -> token ids -> a folder of shards and a manifest (`gptlab prepare`)
    shards       prepared folders, in our and other formats, as two memory-mapped streams of token ids
    labeled      prepared folders of labelled documents, for classification
    sampler      the position in the stream of the g-th sequence of a run

Reading a prepared dataset:

    >>> dataset = Dataset("data/shakespeare-char")              # gptlab.data.shards
    >>> dataset.check(vocab_size=65)
    >>> windows = Windows(dataset.train, 64, "shuffled", 1337)  # gptlab.data.sampler
    >>> windows.batch(first=0, count=12).shape                  # 12 sequences of 64 inputs, and their targets
    (12, 65)

Nothing is imported here, because a training process needs only `shards` and `sampler`, not tokenizers and corpora.
docs/formats.md describes the files.
"""
