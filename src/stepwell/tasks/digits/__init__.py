"""Drawing digits with a flow, judged by a classifier."""
