"""The tables and figures of the three papers, made from the results of a store in the papers' own forms."""
