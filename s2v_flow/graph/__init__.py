"""The graph: nodes and ports, the plan, fingerprints, execution and events. No torch, no YAML."""
