"""Mixture of experts: a router, a dispatcher that moves tokens to their experts and back, and the experts.

`routing` (which experts, with which weights), `balancing` (losses that spread tokens evenly), `aux_loss` (how such a
loss joins the model's), `router` (all of it as a module); `permutation` and `token_dispatcher` (how tokens travel);
`experts` and `shared_experts`; `moe_layer` puts them together.
"""
