"""From documents to batches, with numpy only.

    corpora      documents of a corpus, each in the training or the validation split
    tokenizers   text to token ids and back
    prepare      documents -> tokens -> a folder of shards and a manifest (`gptlab prepare`)
    shards       prepared folders, ours and other people's, as two memory-mapped streams of tokens
    labeled      documents with labels: the same for classification, with a label space
    sampler      which window of a stream is the g-th sequence of a run

Reading a prepared dataset:

    >>> dataset = Dataset("data/shakespeare-char")              # gptlab.data.shards
    >>> dataset.check(vocab_size=65)
    >>> windows = Windows(dataset.train, 64, "shuffled", 1337)  # gptlab.data.sampler
    >>> windows.batch(first=0, count=12).shape                  # 12 sequences of 64 inputs, and their targets
    (12, 65)

Nothing is imported here: a training process needs `shards` and `sampler`, and neither a tokenizer nor a corpus reader.
docs/formats.md describes the files.
"""
