"""The parts that `phi3v_data.convert` is made of.

`convert` lists the items of a source (`source_copy` brings it here first), has an engine
(`local_engine`, `ray_engine`) do an `item_task` for each, writes down in a `journal` what is
finished, and writes the files to an output (`outputs`, `remote_output`) with a `dataset_card`.
"""
