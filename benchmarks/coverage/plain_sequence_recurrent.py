"""Recurrent nets: classifiers, taggers, language models, cell loops, encoder and decoder pairs."""

from __future__ import annotations

import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import constant, given, integers, normal
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class LSTMClassifier(nn.Module):
    """bentrevett's sentiment model: packed, bidirectional, the last two hidden states joined."""

    def __init__(self, vocab_size=60, embedding_dim=24, hidden_dim=20, output_dim=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.rnn = nn.LSTM(embedding_dim, hidden_dim, num_layers=2, bidirectional=True, dropout=0.3)
        self.fc = nn.Linear(hidden_dim * 2, output_dim)
        self.dropout = nn.Dropout(0.3)

    def forward(self, text, text_lengths):
        embedded = self.dropout(self.embedding(text))
        packed_embedded = pack_padded_sequence(embedded, text_lengths.to("cpu"))
        packed_output, (hidden, _cell) = self.rnn(packed_embedded)
        _output, _output_lengths = pad_packed_sequence(packed_output)
        hidden = self.dropout(torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1))
        return self.fc(hidden)


class GRURegressor(nn.Module):
    """A time series notebook: h0 of zeros with the sizes of the constructor, out[:, -1, :]."""

    def __init__(self, input_size=5, hidden_size=32, num_layers=2):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.gru = nn.GRU(input_size, hidden_size, num_layers, batch_first=True)
        self.fc1 = nn.Linear(hidden_size, 24)
        self.fc2 = nn.Linear(24, 1)

    def forward(self, x):
        h0 = torch.zeros(self.num_layers, x.size(0), self.hidden_size).to(x.device)
        out, _ = self.gru(x, h0)
        out = F.relu(self.fc1(out[:, -1, :]))
        return self.fc2(out)


class VanillaRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(7, 16)
        self.rnn = nn.RNN(16, 32, batch_first=True, nonlinearity="relu")
        self.out = nn.Linear(32, 3)

    def forward(self, x):
        r_out, _h = self.rnn(torch.tanh(self.emb(x)))
        return self.out(r_out)


class BiLSTMTagger(nn.Module):
    """batch_first, one layer, both directions added by view; every step is tagged."""

    def __init__(self, vocab=50, dim=24, hidden=32, tags=7):
        super().__init__()
        self.hidden = hidden
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(hidden)
        self.hidden2tag = nn.Linear(hidden, tags)

    def forward(self, sentence):
        self.lstm.flatten_parameters()
        x, _ = self.lstm(self.embed(sentence))
        b, t, _ = x.shape
        x = x.view(b, t, 2, self.hidden).sum(dim=2)
        return self.hidden2tag(self.norm(x))


class LSTMWithProjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 32, num_layers=2, batch_first=True, proj_size=12)
        self.fc = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x):
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        _, (h, _c) = self.lstm(x)
        return self.fc(h[-1])


class CharRNN(nn.Module):
    """Word-language-model example: tied decoder behind a projection, state made and returned."""

    def __init__(self, ntoken=40, ninp=24, nhid=40, nlayers=1, dropout=0.2, tie_weights=True):
        super().__init__()
        self.ntoken = ntoken
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers)
        self.proj = nn.Linear(nhid, ninp)
        self.decoder = nn.Linear(ninp, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.nhid = nhid
        self.nlayers = nlayers

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return (
            weight.new_zeros(self.nlayers, bsz, self.nhid),
            weight.new_zeros(self.nlayers, bsz, self.nhid),
        )

    def forward(self, input):
        hidden = self.init_hidden(input.size(1))
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb, hidden)
        decoded = self.decoder(self.proj(self.drop(output)))
        return F.log_softmax(decoded.view(-1, self.ntoken), dim=1), hidden


class StatefulCharRNN(nn.Module):
    """Udacity's character model: two layers, contiguous().view(-1, n_hidden), state kept inside."""

    def __init__(self, tokens=30, n_hidden=32, n_layers=2, drop_prob=0.3):
        super().__init__()
        self.tokens, self.n_hidden, self.n_layers = tokens, n_hidden, n_layers
        self.lstm = nn.LSTM(tokens, n_hidden, n_layers, dropout=drop_prob, batch_first=True)
        self.dropout = nn.Dropout(drop_prob)
        self.fc = nn.Linear(n_hidden, tokens)
        self.hidden = None

    def forward(self, x):
        x = F.one_hot(x, self.tokens).float()
        if self.hidden is None or self.hidden[0].size(1) != x.size(0):
            zeros = torch.zeros(self.n_layers, x.size(0), self.n_hidden)
            self.hidden = (zeros, zeros.clone())
        r_output, hidden = self.lstm(x, self.hidden)
        if self.training:
            self.hidden = tuple(h.detach() for h in hidden)
        out = self.dropout(r_output)
        out = out.contiguous().view(-1, self.n_hidden)
        return self.fc(out)


class LSTMCellLoop(nn.Module):
    """The sine-wave example: two cells, chunks of the sequence, predictions fed back."""

    def __init__(self, hidden=24):
        super().__init__()
        self.hidden = hidden
        self.lstm1 = nn.LSTMCell(1, hidden)
        self.lstm2 = nn.LSTMCell(hidden, hidden)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, input, future=2):
        outputs = []
        h_t = torch.zeros(input.size(0), self.hidden, dtype=input.dtype)
        c_t = torch.zeros(input.size(0), self.hidden, dtype=input.dtype)
        h_t2 = torch.zeros_like(h_t)
        c_t2 = torch.zeros_like(c_t)
        for input_t in input.split(1, dim=1):
            h_t, c_t = self.lstm1(input_t, (h_t, c_t))
            h_t2, c_t2 = self.lstm2(h_t, (h_t2, c_t2))
            output = self.linear(h_t2)
            outputs += [output]
        for _i in range(future):
            h_t, c_t = self.lstm1(output, (h_t, c_t))
            h_t2, c_t2 = self.lstm2(h_t, (h_t2, c_t2))
            output = self.linear(h_t2)
            outputs += [output]
        return torch.cat(outputs, dim=1)


class GRUCellDecoder(nn.Module):
    """An image feature starts a GRUCell that reads one embedded word at a time."""

    def __init__(self, feature=10, hidden=32, vocab=30):
        super().__init__()
        self.init_h = nn.Linear(feature, hidden)
        self.embed = nn.Embedding(vocab, 16)
        self.cell = nn.GRUCell(16 + 16, hidden)
        self.context = nn.Linear(feature, 16)
        self.fc = nn.Linear(hidden, vocab)

    def forward(self, features, captions):
        h = torch.tanh(self.init_h(features))
        context = self.context(features)
        predictions = torch.zeros(captions.size(0), captions.size(1), self.fc.out_features)
        for t in range(captions.size(1)):
            h = self.cell(torch.cat([self.embed(captions[:, t]), context], dim=1), h)
            predictions[:, t] = self.fc(h)
        return predictions


class HandwrittenLSTM(nn.Module):
    """A cell of raw parameters: one matrix for four gates, cut by slices of the hidden size."""

    def __init__(self, input_sz=6, hidden_sz=24):
        super().__init__()
        self.hidden_size = hidden_sz
        self.W = nn.Parameter(torch.randn(input_sz, hidden_sz * 4) * 0.1)
        self.U = nn.Parameter(torch.randn(hidden_sz, hidden_sz * 4) * 0.1)
        self.bias = nn.Parameter(torch.zeros(hidden_sz * 4))
        self.head = nn.Sequential(nn.Linear(hidden_sz, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x):
        bs, seq_sz, _ = x.size()
        h_t, c_t = (
            torch.zeros(bs, self.hidden_size).to(x.device),
            torch.zeros(bs, self.hidden_size).to(x.device),
        )
        HS = self.hidden_size
        hidden_seq = []
        for t in range(seq_sz):
            gates = x[:, t, :] @ self.W + h_t @ self.U + self.bias
            i_t, f_t, g_t, o_t = (
                torch.sigmoid(gates[:, :HS]),
                torch.sigmoid(gates[:, HS : HS * 2]),
                torch.tanh(gates[:, HS * 2 : HS * 3]),
                torch.sigmoid(gates[:, HS * 3 :]),
            )
            c_t = f_t * c_t + i_t * g_t
            h_t = o_t * torch.tanh(c_t)
            hidden_seq.append(h_t.unsqueeze(0))
        hidden_seq = torch.cat(hidden_seq, dim=0).transpose(0, 1).contiguous()
        return self.head(hidden_seq[:, -1])


class BahdanauAttention(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.Wa = nn.Linear(hidden_size, hidden_size)
        self.Ua = nn.Linear(hidden_size, hidden_size)
        self.Va = nn.Linear(hidden_size, 1)

    def forward(self, query, keys):
        scores = self.Va(torch.tanh(self.Wa(query) + self.Ua(keys)))
        scores = scores.squeeze(2).unsqueeze(1)
        weights = F.softmax(scores, dim=-1)
        return torch.bmm(weights, keys), weights


class Seq2SeqBahdanau(nn.Module):
    """The PyTorch translation tutorial: encoder GRU, attention decoder, teacher forcing."""

    def __init__(self, input_size=40, hidden_size=24, output_size=36, max_length=5):
        super().__init__()
        self.max_length = max_length
        self.embedding = nn.Embedding(input_size, hidden_size)
        self.encoder = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.dec_embedding = nn.Embedding(output_size, hidden_size)
        self.attention = BahdanauAttention(hidden_size)
        self.gru = nn.GRU(2 * hidden_size, hidden_size, batch_first=True)
        self.out = nn.Linear(hidden_size, output_size)

    def forward(self, src, target=None):
        encoder_outputs, hidden = self.encoder(self.embedding(src))
        decoder_input = torch.empty(src.size(0), 1, dtype=torch.long).fill_(0)
        outputs = []
        for i in range(self.max_length):
            embedded = self.dec_embedding(decoder_input)
            query = hidden.permute(1, 0, 2)
            context, _ = self.attention(query, encoder_outputs)
            output, hidden = self.gru(torch.cat((embedded, context), dim=2), hidden)
            output = self.out(output)
            outputs.append(output)
            if target is not None:
                decoder_input = target[:, i].unsqueeze(1)
            else:
                decoder_input = output.topk(1)[1].squeeze(-1).detach()
        return F.log_softmax(torch.cat(outputs, dim=1), dim=-1)


class Seq2SeqLuong(nn.Module):
    """Global attention, 'general' score, time first, random teacher forcing."""

    def __init__(self, vocab=40, emb=16, hid=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, emb)
        self.encoder = nn.LSTM(emb, hid // 2, bidirectional=True)
        self.decoder = nn.LSTM(emb, hid)
        self.attn = nn.Linear(hid, hid)
        self.concat = nn.Linear(hid * 2, hid)
        self.out = nn.Linear(hid, vocab)

    def forward(self, src, trg, teacher_forcing_ratio=0.5):
        enc, (h, c) = self.encoder(self.embedding(src))
        h = torch.cat([h[0], h[1]], dim=1).unsqueeze(0)
        c = torch.cat([c[0], c[1]], dim=1).unsqueeze(0)
        token = trg[0]
        outputs = []
        for t in range(1, trg.size(0)):
            rnn_output, (h, c) = self.decoder(self.embedding(token).unsqueeze(0), (h, c))
            energies = torch.sum(rnn_output * self.attn(enc), dim=2).t()
            weights = F.softmax(energies, dim=1).unsqueeze(1)
            context = weights.bmm(enc.transpose(0, 1)).squeeze(1)
            x = torch.tanh(self.concat(torch.cat((rnn_output.squeeze(0), context), 1)))
            logits = self.out(x)
            outputs.append(logits)
            teacher_force = self.training and random.random() < teacher_forcing_ratio
            token = trg[t] if teacher_force else logits.argmax(1)
        return torch.stack(outputs)


class BiLSTMCRF(nn.Module):
    """Emissions and a transition matrix; the forward algorithm by logsumexp over tags."""

    def __init__(self, vocab=40, emb=16, hidden=32, tags=5):
        super().__init__()
        self.embeds = nn.Embedding(vocab, emb)
        self.lstm = nn.LSTM(emb, hidden // 2, num_layers=1, bidirectional=True, batch_first=True)
        self.mid = nn.Linear(hidden, 24)
        self.hidden2tag = nn.Linear(24, tags)
        self.transitions = nn.Parameter(torch.randn(tags, tags))
        self.start = nn.Parameter(torch.zeros(tags))

    def forward(self, sentence, tags):
        feats = self.hidden2tag(F.relu(self.mid(self.lstm(self.embeds(sentence))[0])))
        alpha = self.start + feats[:, 0]
        score = self.start[tags[:, 0]] + feats[:, 0].gather(1, tags[:, :1]).squeeze(1)
        for t in range(1, feats.size(1)):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.transitions, dim=1) + feats[:, t]
            score = score + self.transitions[tags[:, t - 1], tags[:, t]]
            score = score + feats[:, t].gather(1, tags[:, t : t + 1]).squeeze(1)
        return torch.logsumexp(alpha, dim=1) - score


LENGTHS = constant([9, 7, 4])

CASES: tuple[Case, ...] = (
    Case("plain/lstm_packed", LSTMClassifier, given(integers(60, 9, 3), LENGTHS)),
    Case("plain/gru_h0", GRURegressor, given(normal(3, 8, 5))),
    Case("plain/rnn_relu", VanillaRNN, given(normal(3, 8, 7))),
    Case("plain/bilstm_tagger", BiLSTMTagger, given(integers(50, 3, 8))),
    Case("plain/lstm_projection", LSTMWithProjection, given(normal(3, 8, 6))),
    Case("plain/char_rnn_tied", CharRNN, given(integers(40, 8, 3))),
    Case("plain/char_rnn_stateful", StatefulCharRNN, given(integers(30, 3, 8))),
    Case("plain/lstm_cell_loop", LSTMCellLoop, given(normal(3, 6))),
    Case("plain/gru_cell_caption", GRUCellDecoder, given(normal(3, 10), integers(30, 3, 5))),
    Case("plain/handwritten_lstm", HandwrittenLSTM, given(normal(3, 6, 6))),
    Case("plain/seq2seq_bahdanau", Seq2SeqBahdanau, given(integers(40, 3, 7), integers(36, 3, 5))),
    Case("plain/seq2seq_luong", Seq2SeqLuong, given(integers(40, 7, 3), integers(40, 5, 3))),
    Case("plain/bilstm_crf", BiLSTMCRF, given(integers(40, 3, 6), integers(5, 3, 6))),
)
