"""What a run saves and loads, and where: the rooms behind `megatron.training.checkpointing`.

Saving: `save` (one checkpoint), `context` (what a run knows of its checkpoints), `retention` (which are removed),
`local` and `replication` (`--non-persistent-ckpt-type`), `torch_format` (`--ckpt-format torch`). Loading: `find` (which
checkpoint), `checks` (does it fit), `arguments` (its settings), `load`. Both: `paths`, `state`, `optimizer`, `data`,
`extra_state`.
"""
