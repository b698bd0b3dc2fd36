// Package filter has the drivers that stand between other nodes, or in the place of a file: blkdebug and blkverify, with
// which images are tested, null-co and null-aio, copy-on-read, throttle, compress and preallocate.
//
// Importing the package registers them with package block.
package filter
