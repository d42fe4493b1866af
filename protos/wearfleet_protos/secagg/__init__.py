"""What both ends of secure aggregation share: parameters, messages, keys, masks, shares; pure, without network.

SecAgg+ (Bell et al. 2020, doi:10.1145/3372297.3417885) with the checks of specs/federated.md section 17: the service
learns the sum of the updates of a round and nothing else of any of them.
"""
