"""`report.html`: what a run came to, on one page that needs nothing else: for clinicians above, engineers below."""
