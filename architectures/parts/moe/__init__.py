"""The mixture of experts: routers, experts, and how tokens reach them."""
