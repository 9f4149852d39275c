"""The versioned dataset of embeddings: partitions, the Delta table that names them, and reading them back."""
