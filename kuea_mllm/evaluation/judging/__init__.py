"""Scores given by a language model that reads the answers (LLaVA-Bench).

`prompts` writes the question to the judge as LLaVA published it, `client` asks any endpoint that
speaks OpenAI's chat protocol (the one module that imports `openai`), `verdicts` reads and keeps
what came back, `column` judges the answers of one task, `rejudge` those of finished results.
A verdict that is missing or unreadable is a failure that is counted, never a score.
"""
