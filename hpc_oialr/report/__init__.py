"""From the folders of runs: figures for papers, one HTML page; spectra of checkpoints made elsewhere."""
