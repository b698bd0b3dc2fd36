package qcow2

// VMStateOffset is where, behind the end of the disk, the part of the mapping begins that holds the state of a machine: the
// first guest offset of the first L2 table that maps nothing of the disk.
func (im *Image) VMStateOffset() int64 {
	perTable := im.lay.L2Coverage()
	return (im.Size() + perTable - 1) / perTable * perTable
}
