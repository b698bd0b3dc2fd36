// Package tcmu serves SCSI units to the Linux target (LIO) through its TCM-User interface: the kernel passes commands of any
// fabric (iSCSI, Fibre Channel, vhost, loopback) to this process over shared memory.
//
// # Model
//
// Each device has a [Ring] in memory that it shares with the kernel: a mailbox, a ring of entries, and a data area that
// the entries' vectors point into. The kernel appends entries and moves the head; we take them in order, complete them in
// any order, and move the tail. A completion is written into the entry at the tail, whichever command that entry
// brought: everything a command needs is therefore copied out of its entry, all but the data itself, before any
// completion can happen.
//
// The data area is never copied: reads and writes of the image go straight from and to its pages. A command's pages are ours
// until it is completed, and not a moment longer.
//
// Everything the ring says is checked: the kernel is trusted with more than this, but a bug on either side must end in one
// device that says so, not in memory that is somebody else's.
package tcmu
