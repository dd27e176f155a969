"""Few-shot evaluation: demonstrations with images before every question.

`schemas` reads the seven data sets in their original form, `sampling` and `retrieval` choose the
demonstrations, `task_files` writes what lmms-eval runs, `scoring` is what those files name, and
`completion` answers. Which demonstrations a document gets is settled before the model is opened.
"""
