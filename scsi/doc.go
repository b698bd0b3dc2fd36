// Package scsi is the command set of a disk (SPC-4 and SBC-4) over a block.Device, apart from any transport: a transport
// hands over a command descriptor block and the memory its data moves in, and gets a status and sense data back.
//
// # Model
//
// A [Unit] is one logical unit. [Unit.Execute] runs one command; any number may run at once, in any order, as a queue of
// simple tasks allows. Medium commands move data straight between the device and the transport's memory ([Buffer]), which
// may be in pieces. What the unit says of itself (INQUIRY pages, mode pages, limits, provisioning) is derived from the
// device and from [Options], so that an initiator is told what is true.
//
// Every command that the unit knows stands in one table (commands.go): how it is decoded, what it does to the medium, and
// the usage bits that REPORT SUPPORTED OPERATION CODES shows. A bit of a command descriptor block that is outside its
// usage bits, and set, is an error as the standard wants: nothing is accepted and ignored.
//
// COMPARE AND WRITE and ORWRITE are atomic against every other write: writers share a lock on the regions that they touch,
// those two have it alone.
package scsi
