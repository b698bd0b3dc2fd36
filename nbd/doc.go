// Package nbd serves [block.Device]s to clients of the Network Block Device protocol.
//
// # Life of a connection
//
// [Server.Serve] accepts connections, at most Options.MaxConnections of them at a time. Each has one goroutine, the
// reader, that first conducts the handshake (fixed newstyle, within Options.HandshakeTimeout) and then, once the client
// has chosen an export, reads requests until the client says goodbye, disappears, breaks the protocol, or the server
// drains. Then the reader waits for the requests that are still in flight, their replies are sent if anybody is there to
// take them, and the connection is closed. Nothing of a connection outlives it.
//
// # Batching
//
// The reader takes whatever the socket holds with one read, and decodes every complete request in it. Requests that the
// device can answer at once ([block.TryDevice]: reads and writes of at most 64 KiB) are answered in place, without a
// change of goroutine: reads go directly behind their reply header in the batch, writes come directly from the read
// buffer. The batch of replies leaves with one write before the reader touches the socket again. So a deep queue costs a
// few hundredths of a socket call per request, and a single request costs one read and one write. None of this
// allocates memory.
//
// Every other request (a miss, FUA, a large transfer, flush, trim, zeroes, block status) goes to a worker goroutine of
// that connection. Workers run side by side and reply in whatever order they finish, as the protocol allows. A worker
// that has a reply while another goroutine is sending leaves it in the connection's queue; the sender takes the whole
// queue along with its next vectored write. Payloads of large requests are read from the socket into the buffer that the
// device gets, and sent from the buffer that the device filled.
//
// # Who may block
//
//   - The reader blocks on the socket, on the bounds below, and while it sends; never on the device.
//   - A worker blocks on the device and, when it happens to be the sender, on the socket.
//   - Nobody blocks on a lock that is held over I/O. What connections share after the handshake is two counters of memory.
//
// # Backpressure
//
// A request in a worker's hands, up to the moment when its reply has been sent, holds one of Options.MaxInflight slots
// and its payload's share of Options.MaxMemory. The reader waits for both before it takes a request on, and reads
// nothing meanwhile. So a client that floods the server, or does not take its replies, fills its own socket buffers and
// stalls itself only; and since everything a stalled reader waits for is done by workers that never wait for the reader,
// the connection cannot lock up.
//
// All connections together are bound by Options.MaxTotalMemory, and those of one client (a user on a unix socket, an address
// on a network) by half of it. A request waits for its share in turn, except that each connection may always hold 1 MiB:
// so beside any number of greedy clients, requests of a usual size go on as if nobody else were there. A client that takes
// no replies, or does not finish what it began to write, is cut off after Options.StallTimeout, and gives back what it
// held. In the same way a client that opens connections and says nothing can fill half of Options.MaxConnections, and what
// it opens beyond is closed at once.
//
// # Who may come in
//
// A [Peer] is what the server knows of a client without believing it: the address, the process at the other end of a unix
// socket as the kernel tells it, the certificate that TLS has verified. Export.Allow decides by it; an export that a client
// may not use does not exist for that client, in any answer.
//
// With Options.TLS a client can encrypt the connection, or has to. STARTTLS forgets all that was agreed on before, and a
// connection on which plain text follows it ends, because that text could be anybody's. Encrypted connections take the way
// without RawConn and send replies in runs of full records; everything else is the same. There are certificates, of the
// server and, if the configuration asks for them, of clients. There are no pre-shared keys: the standard library, whose TLS
// this is, does not offer them.
//
// # Failures
//
// A request that fails gets an error reply and the connection lives on. It ends only where the stream cannot be followed
// any further: a wrong magic number, or a payload so long that skipping it is not worth it. What the client learns of an
// error is its number; the text, which may name files of the host, goes to the [Observer].
package nbd
