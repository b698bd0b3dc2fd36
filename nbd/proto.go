package nbd

import "encoding/binary"

// Magic numbers.
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicExtRequest = 0x21e41c71
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
	magicExtReply   = 0x6e8a278c
)

// Handshake flags, of the server and (with the same values) of the client.
const (
	flagFixedNewstyle = 1
	flagNoZeroes      = 2
)

// option is what a client asks for during the handshake.
type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMeta        option = 9
	optSetMeta         option = 10
	optExtendedHeaders option = 11
)

// optReply is the type of an answer to an option.
type optReply uint32

const (
	repAck    optReply = 1
	repServer optReply = 2
	repInfo   optReply = 3
	repMeta   optReply = 4

	repErrUnsupported optReply = 1<<31 + 1
	repErrPolicy      optReply = 1<<31 + 2
	repErrInvalid     optReply = 1<<31 + 3
	repErrTLSRequired optReply = 1<<31 + 5
	repErrUnknown     optReply = 1<<31 + 6
	repErrTooBig      optReply = 1<<31 + 9
	repErrExtHeader   optReply = 1<<31 + 10
)

// Kinds of information about an export.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags of an export.
const (
	txHasFlags   = 1 << 0
	txReadOnly   = 1 << 1
	txFlush      = 1 << 2
	txFUA        = 1 << 3
	txTrim       = 1 << 5
	txZeroes     = 1 << 6
	txDF         = 1 << 7
	txMultiConn  = 1 << 8
	txCache      = 1 << 10
	txFastZeroes = 1 << 11
)

// Command is the type of a request.
type Command uint16

// The commands of the protocol.
const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisconnect  Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
)

// String returns the protocol's name of the command.
func (c Command) String() string {
	switch c {
	case CmdRead:
		return "READ"
	case CmdWrite:
		return "WRITE"
	case CmdDisconnect:
		return "DISC"
	case CmdFlush:
		return "FLUSH"
	case CmdTrim:
		return "TRIM"
	case CmdCache:
		return "CACHE"
	case CmdWriteZeroes:
		return "WRITE_ZEROES"
	case CmdBlockStatus:
		return "BLOCK_STATUS"
	}
	return "unknown command"
}

// cmdFlags modify a request.
type cmdFlags uint16

const (
	cmdFUA        cmdFlags = 1 << 0
	cmdNoHole     cmdFlags = 1 << 1
	cmdDF         cmdFlags = 1 << 2
	cmdReqOne     cmdFlags = 1 << 3
	cmdFastZero   cmdFlags = 1 << 4
	cmdPayloadLen cmdFlags = 1 << 5
)

// Chunk flags and types of structured and extended replies.
const (
	chunkDone = 1

	chunkNone      = 0
	chunkData      = 1
	chunkHole      = 2
	chunkStatus    = 5
	chunkStatusExt = 6
	chunkError     = 1<<15 + 1
)

// replyMode is the form of the replies that a client negotiated. Extended also changes the form of the requests.
type replyMode uint8

const (
	modeSimple replyMode = iota
	modeStructured
	modeExtended
)

// Sizes of headers on the wire.
const (
	requestSize    = 28
	extRequestSize = 32
	simpleSize     = 16
	structuredSize = 20
	extReplySize   = 32
	// maxChunkHead is the longest chunk header, with the fixed part of the longest payload that comes with its own
	// bytes: extended header, offset, hole length.
	maxChunkHead = extReplySize + 12
)

func (m replyMode) requestSize() int {
	if m == modeExtended {
		return extRequestSize
	}
	return requestSize
}

// chunkSize is the length of a chunk's header.
func (m replyMode) chunkSize() int {
	if m == modeExtended {
		return extReplySize
	}
	return structuredSize
}

// header is a decoded request.
type header struct {
	cookie uint64
	off    uint64
	length uint64
	flags  cmdFlags
	cmd    Command
}

// parseHeader decodes a request of m.requestSize() bytes, and reports whether its magic number is right.
func parseHeader(m replyMode, p []byte) (header, bool) {
	h := header{
		flags:  cmdFlags(binary.BigEndian.Uint16(p[4:])),
		cmd:    Command(binary.BigEndian.Uint16(p[6:])),
		cookie: binary.BigEndian.Uint64(p[8:]),
		off:    binary.BigEndian.Uint64(p[16:]),
	}
	if m == modeExtended {
		h.length = binary.BigEndian.Uint64(p[24:])
		return h, binary.BigEndian.Uint32(p) == magicExtRequest
	}
	h.length = uint64(binary.BigEndian.Uint32(p[24:]))
	return h, binary.BigEndian.Uint32(p) == magicRequest
}

// payload returns the number of bytes that follow the request's header.
func (h header) payload(m replyMode) uint64 {
	if h.cmd == CmdWrite || m == modeExtended && h.flags&cmdPayloadLen != 0 {
		return h.length
	}
	return 0
}

// appendSimple appends a simple reply without payload.
func appendSimple(p []byte, e errno, cookie uint64) []byte {
	p = binary.BigEndian.AppendUint32(p, magicSimple)
	p = binary.BigEndian.AppendUint32(p, uint32(e))
	return binary.BigEndian.AppendUint64(p, cookie)
}

// appendChunk appends the header of a chunk of length payload bytes that answers h.
func appendChunk(p []byte, m replyMode, h header, flags, kind uint16, length int) []byte {
	magic := uint32(magicStructured)
	if m == modeExtended {
		magic = magicExtReply
	}
	p = binary.BigEndian.AppendUint32(p, magic)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, kind)
	p = binary.BigEndian.AppendUint64(p, h.cookie)
	if m == modeExtended {
		p = binary.BigEndian.AppendUint64(p, h.off)
		return binary.BigEndian.AppendUint64(p, uint64(length))
	}
	return binary.BigEndian.AppendUint32(p, uint32(length))
}

// appendSuccess appends the reply to a command that returns nothing but its success.
func appendSuccess(p []byte, m replyMode, h header) []byte {
	if m == modeExtended || m == modeStructured && h.cmd == CmdRead {
		return appendChunk(p, m, h, chunkDone, chunkNone, 0)
	}
	return appendSimple(p, 0, h.cookie)
}

// appendError appends the reply to a command that failed.
func appendError(p []byte, m replyMode, h header, e errno) []byte {
	if m == modeSimple {
		return appendSimple(p, e, h.cookie)
	}
	text := e.text()
	p = appendChunk(p, m, h, chunkDone, chunkError, 6+len(text))
	p = binary.BigEndian.AppendUint32(p, uint32(e))
	p = binary.BigEndian.AppendUint16(p, uint16(len(text)))
	return append(p, text...)
}

// appendReadHead appends what precedes the data of a successful read of length bytes at off that is answered in one
// piece.
func appendReadHead(p []byte, m replyMode, h header) []byte {
	if m == modeSimple {
		return appendSimple(p, 0, h.cookie)
	}
	return appendDataHead(p, m, h, chunkDone, h.off, int(h.length))
}

// appendDataHead appends what precedes the data of a chunk that holds length bytes of the export at off.
func appendDataHead(p []byte, m replyMode, h header, flags uint16, off uint64, length int) []byte {
	p = appendChunk(p, m, h, flags, chunkData, 8+length)
	return binary.BigEndian.AppendUint64(p, off)
}

// appendHole appends a chunk that says that length bytes of the export at off are zero.
func appendHole(p []byte, m replyMode, h header, flags uint16, off uint64, length uint32) []byte {
	p = appendChunk(p, m, h, flags, chunkHole, 12)
	p = binary.BigEndian.AppendUint64(p, off)
	return binary.BigEndian.AppendUint32(p, length)
}
