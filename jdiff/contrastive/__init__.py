"""Text-image contrastive training (Radford et al. 2021, CLIP), and what is measured with it.

Who may live here: the loss, the two towers, the experiment of kind "contrastive", retrieval, and
scorers: what tells how well a picture matches its caption, of a run here or of a CLIP folder.
"""
