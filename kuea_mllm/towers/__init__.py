"""Vision towers: every format at the door, one Hugging Face model inside.

`spec` says what a tower is; the rest lies in folders. Each imports only from those below it, and
the two at the top not from each other (contract `towers-one-way` in pyproject.toml):

    converting, inspecting    what the two verbs of that name do
    writing                   a tower as a directory or file, with its card
    reading                   any format to a tower or a text tower; begin with `reading.load`
    model                     the tower in memory: `model.tower`, its fingerprint and features
    formats                   names of tensors, layouts, releases
    files                     weight files and model directories, no matter what is in them
"""
