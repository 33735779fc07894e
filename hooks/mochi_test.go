package hooks_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// These tests show what plain mochi does. They are the alarm for upgrades: what they state is what
// this package is built around. If one fails with a new version, the workaround can go or must change.

// answering is a hook that allows everything and answers publishes to the topic "asked".
type answering struct {
	mqtt.HookBase
	err error
}

func (*answering) ID() string { return "answering" }

func (*answering) Provides(b byte) bool {
	return b == mqtt.OnConnectAuthenticate || b == mqtt.OnACLCheck || b == mqtt.OnPublish
}

func (*answering) OnConnectAuthenticate(*mqtt.Client, packets.Packet) bool { return true }

func (*answering) OnACLCheck(*mqtt.Client, string, bool) bool { return true }

func (h *answering) OnPublish(_ *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	if pk.TopicName == "asked" {
		return pk, h.err
	}
	return pk, nil
}

// plainMochi is mochi with its own listener, as its README has it.
func plainMochi(hook mqtt.Hook) (*mqtt.Server, *listeners.TCP, error) {
	s := mqtt.New(&mqtt.Options{Logger: slog.New(slog.DiscardHandler)})
	if err := s.AddHook(hook, nil); err != nil {
		return nil, nil, err
	}
	l := listeners.NewTCP(listeners.Config{ID: "tcp", Address: "127.0.0.1:0"})
	if err := s.AddListener(l); err != nil {
		return nil, nil, err
	}
	return s, l, s.Serve()
}

func servePlain(t *testing.T, answer error) string {
	t.Helper()
	_, l, err := plainMochi(&answering{err: answer})
	if err != nil {
		t.Fatal(err)
	}
	// The server itself is left to the end of the process: its Close races with connections
	// that are being accepted.
	t.Cleanup(func() { l.Close(func(string) {}) })
	return l.Address()
}

func TestOnPublishOutcomes(t *testing.T) {
	const acked, delivered, dropped = "Puback 0x00", true, false
	for _, answer := range []struct {
		name string
		err  error
		// packets that come back for v3.1.1 QoS 1 and 2, MQTT 5 QoS 1 and 2, and whether
		// subscribers get the message in these cases
		back [4]string
		sent [4]bool
	}{
		{
			"nil", nil,
			[4]string{acked, "Pubrec 0x00", acked, "Pubrec 0x00"},
			[4]bool{delivered, delivered, delivered, delivered},
		},
		{
			"an ordinary error", errors.New("no room"),
			[4]string{acked, "Pubrec 0x00", acked, "Pubrec 0x00"},
			[4]bool{delivered, delivered, delivered, delivered},
		},
		{
			"packets.Code", packets.ErrQuotaExceeded,
			[4]string{acked, "Pubrec 0x00", "Puback 0x97", "Puback 0x97"},
			[4]bool{delivered, delivered, dropped, dropped},
		},
		{
			"ErrRejectPacket", packets.ErrRejectPacket,
			[4]string{"", "", "", ""},
			[4]bool{dropped, dropped, dropped, dropped},
		},
		{
			"CodeSuccessIgnore", packets.CodeSuccessIgnore,
			[4]string{acked, "Pubrec 0x00", acked, "Pubrec 0x00"},
			[4]bool{dropped, dropped, dropped, dropped},
		},
	} {
		address := servePlain(t, answer.err)
		for i, c := range []struct{ version, qos byte }{{4, 1}, {4, 2}, {5, 1}, {5, 2}} {
			t.Run(fmt.Sprintf("%s, version %d QoS %d", answer.name, c.version, c.qos), func(t *testing.T) {
				// Ids are used once: while the last client of that id goes, mochi may take the new
				// one's session away with it (F11).
				subscriber := connected(t, address, 4, fmt.Sprint("subscriber", i))
				subscriber.subscribe("#")
				publisher := connected(t, address, c.version, fmt.Sprint("publisher", i))
				publisher.publish("asked", c.qos, 1, "x")
				if got := show(publisher.next()...); got != answer.back[i] {
					t.Errorf("publisher got %q, want %q", got, answer.back[i])
				}
				end := fmt.Sprint("end", i)
				publisher.publish(end, 0, 0, "x")
				sent := false
				for got := subscriber.read(); got.TopicName != end; got = subscriber.read() {
					sent = sent || got.TopicName == "asked"
				}
				if sent != answer.sent[i] {
					t.Errorf("delivered to the subscriber: %v, want %v", sent, answer.sent[i])
				}
			})
		}
	}
}

func TestOnPublishErrorThatWrapsACode(t *testing.T) {
	t.Run("version 4", func(t *testing.T) {
		publisher := connected(t, servePlain(t, errWrapsCode), 4, "publisher")
		publisher.publish("asked", 1, 1, "x")
		if got := show(publisher.next()...); got != "Puback 0x00" {
			t.Errorf("publisher got %q", got)
		}
	})
	for _, qos := range []byte{1, 2} {
		t.Run(fmt.Sprintf("version 5 QoS %d ends the process", qos), func(t *testing.T) {
			child := startChild(t, "wrap")
			publisher := connected(t, child.address, 5, "publisher")
			publisher.publish("asked", qos, 1, "x")
			child.wantPanic("interface conversion")
		})
	}
}

// OnPublish neither sees nor stops a will: its messages owe nothing to any rule.
func TestWillsSkipOnPublish(t *testing.T) {
	address := servePlain(t, packets.ErrRejectPacket)
	subscriber := connected(t, address, 4, "subscriber")
	subscriber.subscribe("asked")
	vehicle := dial(t, address, 4)
	vehicle.send(packets.Packet{
		FixedHeader: packets.FixedHeader{Type: packets.Connect},
		Connect: packets.ConnectParams{
			ProtocolName: []byte("MQTT"), ClientIdentifier: "v7", Clean: true, Keepalive: 60,
			WillFlag: true, WillTopic: "asked", WillPayload: []byte("gone"),
		},
	})
	vehicle.read()
	vehicle.conn.Close()
	if got := show(subscriber.read()); got != "Publish asked" {
		t.Errorf("subscriber got %s", got)
	}
}

// truncatedSubscribe is an MQTT 5 SUBSCRIBE of eight bytes whose filter "a" has no options byte.
var truncatedSubscribe = []byte{0x82, 6, 0, 1, 0, 0, 1, 'a'}

// F1: a decoder's panic ends the process. TestTruncatedSubscribeEndsItsConnectionAlone is the other half.
func TestPlainMochiDiesOfATruncatedSubscribe(t *testing.T) {
	child := startChild(t, "plain")
	c := connected(t, child.address, 5, "v7")
	c.bytes(truncatedSubscribe...)
	child.wantPanic("index out of range")
}

// F12: the server reserves what any header announces. TestHeadersReserveNothing is the other half.
func TestPlainMochiReservesWhatAHeaderAnnounces(t *testing.T) {
	address := servePlain(t, nil)
	before := allocated()
	c := dial(t, address, 4)
	c.bytes(hugeConnect...)
	for end := time.Now().Add(patience); allocated()-before < 64<<20; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a header that announces 64 MiB reserved nothing")
		}
	}
}

// hugeConnect is the fixed header of a CONNECT with 64 MiB.
var hugeConnect = []byte{0x10, 0x80, 0x80, 0x80, 0x20}

// allocated is how many bytes this process has allocated since it began.
func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// F12: before CONNECT the connection has no deadline. TestSilentConnectionIsClosed is the other half.
func TestPlainMochiWaitsForConnectForEver(t *testing.T) {
	s := mqtt.New(&mqtt.Options{Logger: slog.New(slog.DiscardHandler)})
	defer s.Close()
	_ = s.EstablishConnection("tcp", &silentConn{onRead: func(deadline bool) {
		if deadline {
			t.Error("there was a deadline when CONNECT was read")
		}
	}})
}

// silentConn is a connection whose peer has closed it at once.
type silentConn struct {
	net.Conn
	deadline bool
	onRead   func(deadline bool)
}

func (c *silentConn) RemoteAddr() net.Addr { return &net.TCPAddr{} }
func (c *silentConn) Close() error         { return nil }
func (c *silentConn) SetDeadline(time.Time) error {
	c.deadline = true
	return nil
}

func (c *silentConn) Read([]byte) (int, error) {
	c.onRead(c.deadline)
	return 0, io.EOF
}

var errWrapsCode = fmt.Errorf("no room: %w", packets.ErrQuotaExceeded)

// childRole is the environment variable that makes the test program a server that may die.
const childRole = "THROUGHLINE_TEST_CHILD"

func TestMain(m *testing.M) {
	role := os.Getenv(childRole)
	if role == "" {
		os.Exit(m.Run())
	}
	address, err := childServer(role)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(address)
	_, _ = io.Copy(io.Discard, os.Stdin) // until the parent goes
}

func childServer(role string) (address string, err error) {
	switch role {
	case "ours":
		const listener = "127.0.0.1:0"
		x, err := tracectx.NewExtractor(tracectx.Fields{SW8: "sw8"})
		if err != nil {
			return "", err
		}
		s, err := hooks.New(hooks.Options{
			Listeners: []hooks.ListenerOptions{{Name: "tcp", Address: listener}},
			Auth:      auth.NewPolicy(auth.Options{Listeners: []auth.Listener{{Name: "tcp", Address: listener}}}),
			Rules:     func() *rules.Set { return nil },
			Append:    func([]bridge.Record) (hooks.Commit, error) { return done(nil), nil },
			Extractor: x, Tracer: tracectxtest.NewUnsampledRecorder("broker"),
		})
		if err != nil {
			return "", err
		}
		s.Start()
		return s.Addresses()[0], nil
	case "wrap":
		_, l, err := plainMochi(&answering{err: errWrapsCode})
		if err != nil {
			return "", err
		}
		return l.Address(), nil
	default:
		_, l, err := plainMochi(&answering{})
		if err != nil {
			return "", err
		}
		return l.Address(), nil
	}
}

type child struct {
	t       testing.TB
	cmd     *exec.Cmd
	address string
	stderr  bytes.Buffer
}

func startChild(t testing.TB, role string) *child {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	c := &child{t: t, cmd: exec.CommandContext(ctx, os.Args[0])}
	c.cmd.Env = append(os.Environ(), childRole+"="+role)
	c.cmd.Stderr = &c.stderr
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close() })
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("start child: %v", err)
	}
	c.address = strings.TrimSpace(line)
	return c
}

// wantPanic fails unless the child ends, with a panic of that text.
func (c *child) wantPanic(text string) {
	c.t.Helper()
	err := c.cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(c.stderr.String(), text) {
		c.t.Errorf("child ended with %v; want a panic with %q\n%s", err, text, c.stderr.String())
	}
}
