"""Does a compressed context lose in steps what needles do not show?"""
