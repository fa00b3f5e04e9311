"""`fastgen.accelerate`: models that other people wrote, on the fused operations.

Dynamo captures a model's own forward as a graph; `matching` finds in it what the operations of `fastgen.ops` compute;
`rewriting` puts those in its place; `accelerating` puts the result behind the model's call.
"""
