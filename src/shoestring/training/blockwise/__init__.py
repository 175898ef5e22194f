"""Block-wise training: every block of a denoiser is a job of its own; `merge` makes them one model.

config      the settings of such a run, read without torch
pictures    images from a file; letters: bytes of a text
task        what a block is trained on: data, objective, table, and the identity merge compares
wrapped     the same for a transformer of diffusers
job         one block: built alone, trained, saved, gone on with bit for bit
every       all blocks in one process, one of them in memory at a time
on_ray      all blocks as jobs of Ray, killed or not the same bits
merging     the blocks of one or many directories put together
sampling    a merged model draws and answers: each noise level by the block that owns it
png         images as a picture

Nothing is imported here, so that settings are read quickly.
"""
