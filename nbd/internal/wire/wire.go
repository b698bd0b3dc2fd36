// Package wire is the facts of the NBD protocol: what numbers mean between a server and a client.
package wire

// Magic numbers.
const (
	MagicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	MagicOption     = 0x49484156454f5054 // "IHAVEOPT"
	MagicOptReply   = 0x0003e889045565a9
	MagicRequest    = 0x25609513
	MagicExtRequest = 0x21e41c71
	MagicSimple     = 0x67446698
	MagicStructured = 0x668e33ef
	MagicExtReply   = 0x6e8a278c
	MagicOldServer  = 0x0000420281861253 // of a server from before there were options
)

// Handshake flags, of the server and (with the same values) of the client.
const (
	FlagFixedNewstyle = 1
	FlagNoZeroes      = 2
)

// Option is what a client asks for during the handshake.
type Option uint32

const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMeta        Option = 9
	OptSetMeta         Option = 10
	OptExtendedHeaders Option = 11
)

// OptReply is the type of an answer to an option.
type OptReply uint32

const (
	RepAck    OptReply = 1
	RepServer OptReply = 2
	RepInfo   OptReply = 3
	RepMeta   OptReply = 4

	RepErrUnsupported OptReply = 1<<31 + 1
	RepErrPolicy      OptReply = 1<<31 + 2
	RepErrInvalid     OptReply = 1<<31 + 3
	RepErrPlatform    OptReply = 1<<31 + 4
	RepErrTLSRequired OptReply = 1<<31 + 5
	RepErrUnknown     OptReply = 1<<31 + 6
	RepErrShutdown    OptReply = 1<<31 + 7
	RepErrBlockSize   OptReply = 1<<31 + 8
	RepErrTooBig      OptReply = 1<<31 + 9
	RepErrExtHeader   OptReply = 1<<31 + 10
)

// Kinds of information about an export.
const (
	InfoExport      = 0
	InfoName        = 1
	InfoDescription = 2
	InfoBlockSize   = 3
)

// Transmission flags of an export.
const (
	TxHasFlags   = 1 << 0
	TxReadOnly   = 1 << 1
	TxFlush      = 1 << 2
	TxFUA        = 1 << 3
	TxTrim       = 1 << 5
	TxZeroes     = 1 << 6
	TxDF         = 1 << 7
	TxMultiConn  = 1 << 8
	TxCache      = 1 << 10
	TxFastZeroes = 1 << 11
)

// CmdFlags modify a request.
type CmdFlags uint16

const (
	CmdFUA        CmdFlags = 1 << 0
	CmdNoHole     CmdFlags = 1 << 1
	CmdDF         CmdFlags = 1 << 2
	CmdReqOne     CmdFlags = 1 << 3
	CmdFastZero   CmdFlags = 1 << 4
	CmdPayloadLen CmdFlags = 1 << 5
)

// Chunk flags and types of structured and extended replies.
const (
	ChunkDone = 1

	ChunkNone      = 0
	ChunkData      = 1
	ChunkHole      = 2
	ChunkStatus    = 5
	ChunkStatusExt = 6
	ChunkError     = 1<<15 + 1
	ChunkErrorAt   = 1<<15 + 2
)

// Error numbers.
const (
	ErrPerm     = 1
	ErrIO       = 5
	ErrNoMem    = 12
	ErrInval    = 22
	ErrNoSpace  = 28
	ErrOverflow = 75
	ErrNotSup   = 95
	ErrShutdown = 108
)

// Sizes of what has a fixed one.
const (
	RequestSize    = 28
	SimpleSize     = 16
	StructuredSize = 20
	OptReplySize   = 20
)

// States of the context base:allocation.
const (
	StateHole = 1 << 0 // no host space is in use
	StateZero = 1 << 1 // reads as zeroes
)

// DefaultPort is the port that servers listen on.
const DefaultPort = "10809"

// MaxString bounds names in the protocol.
const MaxString = 4096
