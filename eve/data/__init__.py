"""The resumable stream: shards, readers, mixture, transforms, tokenizer, batches."""
