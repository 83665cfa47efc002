"""Full runs as Python: a config, the life it describes, and what drives a life in a folder.

- `digits`: a small recurrent model reads handwritten digits while the task keeps changing
- `panel`: the learner and its opponents, and their scores
- `drive`: records, saving, resuming, progress
"""
