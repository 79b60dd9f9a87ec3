"""What `artemis bench` measures with: models, arms, gates, timing in turns, tables and pictures.

A benchmark is a list of *steps* (a workload, an arm, a cell: which part of which model on how many
tokens). `worker` runs steps in a process of their own and streams what it sees; `session` packs
them into processes, keeps what is known, and writes it down; `train`, `decode`, `memory` and
`kernels` say which steps they need and make their tables from the answers.
"""
