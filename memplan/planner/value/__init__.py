"""What a rank is worth, by tier: priors without data, and what data says.

| tier | from | gives |
|---|---|---|
| T0 | nothing: `priors/`, and `robust` over all of them | ranks |
| T1 | weights: `quantization_error` | bits only |
| T2 | a few batches, forward only: `explained_variance` | ranks |

T1 says nothing of ranks: the error of NF4 is white, so its largest singular values hold
what those of noise hold. Every tier gives a loss: what is lost by a rank beside an
unbounded one, a share of the module's worth that falls as the rank rises.
"""
