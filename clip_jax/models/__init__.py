"""The models: towers, CLIP, and the table of architectures. They know no mesh, no file and no loss."""
