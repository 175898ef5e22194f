"""What does training block by block cost and save, against the arms its paper left out?"""
