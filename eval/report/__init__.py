"""The report page `reports/index.html`."""
