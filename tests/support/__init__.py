"""What tests share: clones of the working tree, commands in them, tiny models, a Blob service."""
