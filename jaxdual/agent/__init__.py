"""The KV agent: a process beside each engine that reads and writes its block store, so that the engine never waits."""
