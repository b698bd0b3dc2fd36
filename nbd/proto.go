package nbd

import (
	"encoding/binary"

	"github.com/droverproject/drover/nbd/internal/wire"
)

// Magic numbers.
const (
	magicInit       = wire.MagicInit
	magicOption     = wire.MagicOption
	magicOptReply   = wire.MagicOptReply
	magicRequest    = wire.MagicRequest
	magicExtRequest = wire.MagicExtRequest
	magicSimple     = wire.MagicSimple
	magicStructured = wire.MagicStructured
	magicExtReply   = wire.MagicExtReply
)

// Handshake flags, of the server and (with the same values) of the client.
const (
	flagFixedNewstyle = wire.FlagFixedNewstyle
	flagNoZeroes      = wire.FlagNoZeroes
)

// option is what a client asks for during the handshake.
type option = wire.Option

const (
	optExportName      = wire.OptExportName
	optAbort           = wire.OptAbort
	optList            = wire.OptList
	optStartTLS        = wire.OptStartTLS
	optInfo            = wire.OptInfo
	optGo              = wire.OptGo
	optStructuredReply = wire.OptStructuredReply
	optListMeta        = wire.OptListMeta
	optSetMeta         = wire.OptSetMeta
	optExtendedHeaders = wire.OptExtendedHeaders
)

// optReply is the type of an answer to an option.
type optReply = wire.OptReply

const (
	repAck    = wire.RepAck
	repServer = wire.RepServer
	repInfo   = wire.RepInfo
	repMeta   = wire.RepMeta

	repErrUnsupported = wire.RepErrUnsupported
	repErrPolicy      = wire.RepErrPolicy
	repErrInvalid     = wire.RepErrInvalid
	repErrTLSRequired = wire.RepErrTLSRequired
	repErrUnknown     = wire.RepErrUnknown
	repErrTooBig      = wire.RepErrTooBig
	repErrExtHeader   = wire.RepErrExtHeader
)

// Kinds of information about an export.
const (
	infoExport      = wire.InfoExport
	infoName        = wire.InfoName
	infoDescription = wire.InfoDescription
	infoBlockSize   = wire.InfoBlockSize
)

// Transmission flags of an export.
const (
	txHasFlags   = wire.TxHasFlags
	txReadOnly   = wire.TxReadOnly
	txFlush      = wire.TxFlush
	txFUA        = wire.TxFUA
	txTrim       = wire.TxTrim
	txZeroes     = wire.TxZeroes
	txDF         = wire.TxDF
	txMultiConn  = wire.TxMultiConn
	txCache      = wire.TxCache
	txFastZeroes = wire.TxFastZeroes
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
type cmdFlags = wire.CmdFlags

const (
	cmdFUA        = wire.CmdFUA
	cmdNoHole     = wire.CmdNoHole
	cmdDF         = wire.CmdDF
	cmdReqOne     = wire.CmdReqOne
	cmdFastZero   = wire.CmdFastZero
	cmdPayloadLen = wire.CmdPayloadLen
)

// Chunk flags and types of structured and extended replies.
const (
	chunkDone = wire.ChunkDone

	chunkNone      = wire.ChunkNone
	chunkData      = wire.ChunkData
	chunkHole      = wire.ChunkHole
	chunkStatus    = wire.ChunkStatus
	chunkStatusExt = wire.ChunkStatusExt
	chunkError     = wire.ChunkError
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
	requestSize    = wire.RequestSize
	extRequestSize = 32
	simpleSize     = wire.SimpleSize
	structuredSize = wire.StructuredSize
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
