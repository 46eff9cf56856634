"""An object store as the home of a run directory (docs/storage.md).

Layers, each using those before it: `faults`, `objects` (bytes under keys, verified and tried again),
`run_store` (a run's layout, claims and fence), `commits` and `checkpoints` (what is committed how), `restore`
and `mirror` (from and to this machine). Readers need the first three. It takes the standard library,
`influence.rundir` without numpy, and obstore, which is imported when a store is opened.
"""
