// Package vm boots Debian's kernel in QEMU's software emulation, with nothing installed on the host but packages, and runs
// drover in it beside the kernel's own SCSI target. It needs neither root nor KVM.
//
// # How
//
// [Prepare] makes a cache folder with the kernel (downloaded by apt and unpacked, never installed) and an initial RAM disk
// of busybox, the modules in the order of their needs, and the programs that jobs use, with their libraries. [VM.Run]
// appends a second archive with drover and one job, a shell script, adds a disk with images, boots, and returns the lines
// that the job reported: "RESULT NAME ok" or "RESULT NAME FAIL what". The disk can be looked into afterwards, with the
// host's tools.
package vm
