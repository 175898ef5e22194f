"""The command line: `main` hands over to one file per verb. Nothing else imports this package."""
