"""Numbers about models, from tensors.

- `scores`: bits, accuracy, Brier, calibration, kappa, temporal kappa, absolute error, and collections of them
- `mixing`: mean mixing distance, how many steps back a layer looks
- `perplexity`: perplexity beside accuracy, and whether it picks the model that is right
- `information`: plasticity and empowerment in bits, exactly; `capacity`: the most that they could be
- `lifetimes`, `context_tree`: the same from many lives, and from one long life
"""
