"""What people do with the embeddings; a module each. They see the dataset and nothing behind it."""
