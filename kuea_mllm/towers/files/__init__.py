"""Weight files and model directories on disk: found, read and written tensor by tensor."""
