// Package client is the other end of the NBD protocol: a [Client] makes the bytes of an export those of a
// [storage.File], so that a disk, or an image with its backing files, can lie on a server. [List] asks what a server has.
//
// Importing the package makes its names known to [block.ParseName] and its driver, "nbd", to descriptions of nodes.
//
// A server is not trusted: what it sends is bounded before it is kept, and whatever it sends at the wrong time ends the
// connection.
package client
