"""Names of what is dear to compute again, which remat "dots" keeps beside plain matrix products.

A kernel or a loop is no `dot_general`, so a policy of `jax.checkpoint` finds its results by name
(`jax.ad_checkpoint.checkpoint_name`), given inside of a custom gradient where there is one.
"""

ATTENTION = "blockwise_attention"
GROUPED = "grouped_product"
