"""The activation store: a chunked Zarr group written shard by shard, read as shuffled batches."""
