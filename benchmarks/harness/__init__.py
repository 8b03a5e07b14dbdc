"""The part of the benchmarks that knows no op: checking, timing, limits, memory, table, JSON and chart."""
