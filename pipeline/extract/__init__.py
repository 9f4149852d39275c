"""Turn shards into partitions: decode, frozen backbone, the overlapped loop, and the loop as a Ray actor."""
