"""Tokens in shards: a corpus of any size, made by many machines, read by all.

`python -m tools.tokenize` writes a folder, on disk or in a bucket, which
`data.source=tokens:FOLDER` reads. It holds

  begun.json           of which source and tokenizer it is being made
  00000.arrayrecord    a shard: the tokens of some files, record by record
  00000.npz            of its records where they begin, of its documents how
                       many tokens and bytes they have; for what is below
  00000.json           that it is finished: its figures and its checksum
  index.json           that all are: the figures of the whole
  split-20/00000.marks which tokens are held out by data.holdout_every=20, by
                       record: what finds a token in one look
  split-20.json        likewise, by shard

A process keeps of all this a row of numbers for each shard, of which there are
at most some ten thousands, and pages in a cache of fixed size.
"""
