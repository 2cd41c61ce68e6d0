"""Pairs on disk: `writer` and `reader` know one shard file, `shards` the run made of them."""
